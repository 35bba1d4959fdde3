"""Reinforcement learning and meta-learning: trainers and the run folder."""
