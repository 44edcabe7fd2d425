"""Start any stage on Slurm or here."""
