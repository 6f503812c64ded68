"""`python -m trainers.distillation`: `gen2embed distill` for launchers such as `torchrun --nproc_per_node=8 -m …`."""

from trainers.train import main

if __name__ == "__main__":
    main("python -m trainers.distillation", "trainers.distillation.distill")
