"""How objectives compose into methods: plain code that runs in one process or spread over a cluster."""
