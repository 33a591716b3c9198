"""What is asked of the predictor's versions."""

from typing import Annotated, Final

from pydantic import Field

from compute_node.http.request_fields import RequestFields

_MAX_NAME_CHARS: Final = 200
_MAX_WHY_CHARS: Final = 500

VersionName = Annotated[str, Field(min_length=1, max_length=_MAX_NAME_CHARS)]


class ChangeFields(RequestFields):
    """A change, which is written down with its reason."""

    why: Annotated[str, Field(min_length=1, max_length=_MAX_WHY_CHARS)] = "asked for on the node's page"


class GuardedFields(ChangeFields):
    """A change that may depend on which version is active."""

    expected_active: VersionName | None = None


class ActivateFields(GuardedFields):
    """A version that is to make the hints: of all requests, or of a share of them."""

    version: VersionName
    canary_share: Annotated[float, Field(gt=0, lt=1)] | None = None


class ShadowFields(ChangeFields):
    """A version that is to look on."""

    version: VersionName
