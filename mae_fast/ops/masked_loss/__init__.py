from .op import masked_loss as masked_loss
