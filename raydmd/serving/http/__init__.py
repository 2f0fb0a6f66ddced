"""The HTTP API: OpenAI's routes for pictures and videos over a `raydmd.serving.contract.Backend`."""

from raydmd.serving.http.app import make_app as make_app
