package routes.GET.admin["user-files"]

import rego.v1

default allowed := false
