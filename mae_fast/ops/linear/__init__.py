from .op import linear as linear
