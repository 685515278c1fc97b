package conformance.tree.GET.documents

import rego.v1

allowed := true

visible := true
