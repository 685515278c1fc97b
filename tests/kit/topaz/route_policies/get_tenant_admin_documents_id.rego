package routes.GET.__tenant.admin.documents.__id

import rego.v1

default allowed := false
