package routes.GET.v1["0"].admin.documents.__id

import rego.v1

default allowed := false
