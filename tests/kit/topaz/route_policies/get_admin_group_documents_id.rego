package routes.GET.admin.__group.documents.__id

import rego.v1

default allowed := false
