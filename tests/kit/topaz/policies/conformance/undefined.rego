package conformance.undefined

import rego.v1

# Without a default there is no answer at all for anybody else.
allowed if input.resource.owner == "alice"
