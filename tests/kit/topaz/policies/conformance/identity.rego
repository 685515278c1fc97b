package conformance.identity

import rego.v1

default allowed := false

allowed if {
	input.identity.type == "IDENTITY_TYPE_MANUAL"
	input.identity.identity == "alice"
}
