"""`hvd benchmark`: a matrix of policies on simulated tasks, with the statistics of their differences."""
