package conformance.odd

import rego.v1

allowed := "yes"

visible := true
