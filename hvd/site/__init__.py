"""`hvd site check`: tries a cluster with one small job before anything expensive is queued."""
