"""The rules of a policy in an intermediate's file: what their keys mean."""

import attrs

from ztna.config.structure import means
from ztna.config.values import ServiceIdOrAny, Who


@attrs.frozen
class PolicyRuleKeys:
    """What the keys of a `PolicyRule` may hold."""

    who: Who = attrs.field(
        metadata=means('"agent/NAME" or "connector/NAME"; "*" as NAME means all of them.')
    )
    services: tuple[ServiceIdOrAny, ...] = attrs.field(
        metadata=means('Ids of the services that the agent may reach; "*" means all.'), default=()
    )
    provides: tuple[ServiceIdOrAny, ...] = attrs.field(
        metadata=means('Ids of the services that the connector may provide; "*" means all.'),
        default=(),
    )
