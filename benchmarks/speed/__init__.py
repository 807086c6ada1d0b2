"""Side-by-side timings against what a user would do without featxfer."""
