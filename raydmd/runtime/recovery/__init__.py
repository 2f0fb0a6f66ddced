"""What is lost, how that is found out, and from where all go on."""
