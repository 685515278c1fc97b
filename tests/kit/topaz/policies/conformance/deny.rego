package conformance.deny

import rego.v1

default allowed := false
