"""`hvd jobs`: what became of the jobs that launch/submit.py handed to a cluster. Imports no jax."""
