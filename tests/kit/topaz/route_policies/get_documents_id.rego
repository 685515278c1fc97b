package routes.GET.documents.__id

import rego.v1

default allowed := true
