#!/bin/sh
# Paints with curl: a file from the gateway, then events from Triton.
set -eu
gateway=${TWINBRUSH_GATEWAY:-http://127.0.0.1:8080}
triton=${TWINBRUSH_TRITON:-http://127.0.0.1:8000}

curl -sS --fail-with-body "$gateway/v1/images/generations" -H 'content-type: application/json' \
  -d '{"prompt": "a small green star on black", "seed": 7, "response_format": "b64_json"}' |
  sed 's/.*"b64_json": *"\([^"]*\)".*/\1/' | base64 -d > star.png

curl -sSN --fail-with-body "$triton/v2/models/text_to_image_stream/generate_stream" \
  -d '{"prompt": "a small green star on black", "steps": 6, "preview_every": 2}' |
  cut -c 1-120
