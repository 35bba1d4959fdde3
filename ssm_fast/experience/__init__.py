"""Experience that is kept for replay."""

from ssm_fast.experience.experience_buffer import ExperienceBuffer

__all__ = ["ExperienceBuffer"]
