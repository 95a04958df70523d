"""The gateway's OpenAPI description, held against the gateway by schemathesis."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, Phase, settings

from gateway.app import Settings, create_app
from gateway.gate import Gate
from gateway.keys import Key, KeyRing, Limits
from gateway.pool import Pool

EXCLUDED = [
    # A valid body may still name a size or a sampler that the checkpoint has not.
    schemathesis.checks.positive_data_acceptance,
    # Starlette lists the methods of a path's first route alone.
    schemathesis.checks.allow_header_conformance,
]


def description(*keys: Key) -> dict:
    settings = Settings(KeyRing(keys, Limits()), page=False)
    return create_app(Pool([], timeout=5), settings, Gate()).openapi()


schema = schemathesis.openapi.from_dict(description())


@schema.parametrize()
@settings(
    max_examples=8, derandomize=True, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck), database=None,
)  # fmt: skip
def test_the_gateway_is_as_its_description_says(gateway, case):
    case.call_and_validate(base_url=gateway.url, excluded_checks=EXCLUDED)


def test_the_description_says_where_a_key_is_needed():
    paths = description(Key("ann", "0" * 64, Limits()))["paths"]
    assert paths["/v1/images/generations"]["post"]["security"] == [{"key": []}]
    assert "security" not in paths["/health/live"]["get"]
    assert "security" not in description()["paths"]["/v1/images/generations"]["post"]


def test_the_description_has_no_errors_that_never_come():
    operations = [o for path in description()["paths"].values() for o in path.values()]
    assert len(operations) > 20
    assert not [o for o in operations if "422" in o["responses"]]
