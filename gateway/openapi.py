"""The OpenAPI description: FastAPI's, with the errors that the gateway really answers."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from gateway.guard import LOCKED

KEY = {"key": {"type": "http", "scheme": "bearer"}}


def describe(app: FastAPI, with_keys: bool) -> dict[str, Any]:
    """The description of an application, made once.

    FastAPI lists 422 for what is invalid; the gateway answers 400, which each route lists.
    """
    if app.openapi_schema is not None:
        return app.openapi_schema
    schema = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if with_keys and path.startswith(LOCKED):
                operation["security"] = [{"key": []}]
    if with_keys:
        schema.setdefault("components", {})["securitySchemes"] = KEY
    for name in ("HTTPValidationError", "ValidationError"):
        schema.get("components", {}).get("schemas", {}).pop(name, None)
    app.openapi_schema = schema
    return schema
