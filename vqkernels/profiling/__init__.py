"""What a search and a quantizer step cost on one machine, and why: measurement, roofline, trace and report."""
