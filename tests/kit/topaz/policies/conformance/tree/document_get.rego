package conformance.tree.GET.documents.__id

import rego.v1

default allowed := false

allowed if input.resource.id == "42"
