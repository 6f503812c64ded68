"""The command `python -m trainers`, which is the same as `gen2embed train`; see `trainers.train`."""

from trainers.train import main

if __name__ == "__main__":
    main("python -m trainers")
