"""A baseline that needs more than there is."""

import timm


class ColPali(timm.models.VisionTransformer):
    pass
