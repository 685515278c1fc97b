"""The same application with a status page, whose streams do not end by themselves."""

from __future__ import annotations

from fastapi_topaz import status_app
from fastapi_topaz._app import status_stream
from kit.workers.app import app, config


status_stream.LONGEST = 3600
app.mount("/topaz", status_app(config, guard=lambda _request: True))

__all__ = ["app"]
