"""The maths of diffusion: schedules, times, solvers and keyed random numbers. No networks, no Ray."""
