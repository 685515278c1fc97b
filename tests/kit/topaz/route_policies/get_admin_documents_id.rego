package routes.GET.admin.documents.__id

import rego.v1

default allowed := false
