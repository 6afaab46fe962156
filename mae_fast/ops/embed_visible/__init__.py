from .op import embed_visible as embed_visible
