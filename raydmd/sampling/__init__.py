"""Phases and step grids, and the few-step rollout through a phase's experts."""
