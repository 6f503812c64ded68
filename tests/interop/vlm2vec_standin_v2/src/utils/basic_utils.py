"""Messages, and moving a batch."""

import logging

import torch

logging.basicConfig(level=logging.INFO)
logger = logging.getLogger(__name__)


def print_master(message):
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        logger.info(message)


def batch_to_device(batch, device):
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
