package conformance.tree.POST.documents

import rego.v1

default allowed := false

# Undefined for everybody but alice.
visible if input.resource.owner == "alice"
