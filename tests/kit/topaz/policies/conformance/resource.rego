package conformance.resource

import rego.v1

default allowed := false

allowed if input.resource.owner == "alice"
