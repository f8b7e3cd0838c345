"""`hvd replay`: a robot's recorded questions, asked again."""
