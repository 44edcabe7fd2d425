"""``python -m halfseen.pretrain.distill RECIPE_OR_RUN key=value ...``, also under torchrun -m."""

from halfseen.cli import run_stage

from .train import main

if __name__ == "__main__":
    run_stage(main)
