"""The expert MoE on Ray Serve: stages that scale apart, an HTTP API as OpenAI's, and a page to play with."""
