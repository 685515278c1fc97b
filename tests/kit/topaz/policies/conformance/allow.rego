package conformance.allow

import rego.v1

allowed := true

visible := false
