"""What the callbacks cost a fit beside scoring and calibration."""
