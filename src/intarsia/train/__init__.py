"""Training: optimiser with float32 masters, schedules as pure functions, state that resumes exactly."""
