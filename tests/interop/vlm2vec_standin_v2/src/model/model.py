"""The model that the script calls."""

from torch import nn

from src.model.processor import backbone2model


class MMEBModel(nn.Module):
    @classmethod
    def load(cls, model_args, is_trainable=True, **kwargs):
        return cls(backbone2model[model_args.model_backbone].from_pretrained(model_args.model_name))

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, qry=None, tgt=None):
        raise AssertionError("another backbone's model")
