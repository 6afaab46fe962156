from .op import decoder_tokens as decoder_tokens
