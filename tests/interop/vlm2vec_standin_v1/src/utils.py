"""Messages."""

import logging

import torch

logging.basicConfig(level=logging.INFO)
logger = logging.getLogger(__name__)


def print_rank(message):
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    logger.info("rank %d: %s", rank, message)


def print_master(message):
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        logger.info(message)
