"""From one command to the steps of a stage, on this machine or as jobs of a cluster."""
