"""gs:// and s3:// files and folders as local paths; cache.py is what others call."""
