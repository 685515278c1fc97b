package conformance.fails

import rego.v1

# Two answers at once, which only shows when somebody asks for alice's.
allowed if input.resource.owner == "alice"

allowed := false if input.resource.owner != "bob"
