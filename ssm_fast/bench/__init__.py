"""What `ssm-fast bench` measures: the ops and layers of a machine beside what else there is."""
