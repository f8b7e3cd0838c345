"""Where jobs run: this machine, Slurm, Kubernetes."""
