{{/* Names, labels, the image, and quantities. */}}

{{/* The chart's name, or what replaces it. */}}
{{- define "anycontrast.name" -}}
{{- default .Chart.Name .Values.nameOverride -}}
{{- end -}}

{{/* Name of all objects; its length is checked, never cut, because a cut name may be another's. */}}
{{- define "anycontrast.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := include "anycontrast.name" . -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- end -}}
{{- end -}}

{{/* Name of the RayJob. */}}
{{- define "anycontrast.jobName" -}}
{{- printf "%s-%s" (include "anycontrast.fullname" .) .Values.job.name -}}
{{- end -}}

{{/* What all pods of the release have and nothing else has. */}}
{{- define "anycontrast.selectorLabels" -}}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/part-of: {{ include "anycontrast.name" . | quote }}
{{- end -}}

{{/* Labels of every object. `app.kubernetes.io/name` is left out: on pods it is KubeRay's. */}}
{{- define "anycontrast.labels" -}}
{{ include "anycontrast.selectorLabels" . }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name (.Chart.Version | replace "+" "_") | quote }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of a pod: (dict "root" $ "component" "head" "extra" MAP). No version among them, so
that an upgrade of the chart alone does not change pods. */}}
{{- define "anycontrast.podLabels" -}}
{{- $labels := merge (dict "app.kubernetes.io/component" .component) (include "anycontrast.selectorLabels" .root | fromYaml) -}}
{{- toYaml (merge $labels (.extra | default dict) .root.Values.commonLabels) -}}
{{- end -}}

{{/* Image reference: (dict "image" MAP "tag" DEFAULT_TAG). */}}
{{- define "anycontrast.imageReference" -}}
{{- $tag := .image.tag | default .tag -}}
{{- if .image.digest -}}
{{- printf "%s:%s@%s" .image.repository $tag .image.digest -}}
{{- else -}}
{{- printf "%s:%s" .image.repository $tag -}}
{{- end -}}
{{- end -}}

{{- define "anycontrast.image" -}}
{{- include "anycontrast.imageReference" (dict "image" .Values.image "tag" .Chart.AppVersion) -}}
{{- end -}}

{{/* MiB of a quantity that the schema has let through (Mi, Gi or Ti). */}}
{{- define "anycontrast.mebibytes" -}}
{{- $units := dict "Mi" 1 "Gi" 1024 "Ti" 1048576 -}}
{{- $unit := regexFind "[MGT]i$" . -}}
{{- mul (trimSuffix $unit . | int64) (get $units $unit) -}}
{{- end -}}

{{/* Bytes of Ray's object store: three quarters of /dev/shm, the rest is NCCL's. Left to itself Ray
takes 30 % of the memory, and where /dev/shm is smaller than that, the disk under /tmp. */}}
{{- define "anycontrast.objectStoreBytes" -}}
{{- mul (include "anycontrast.mebibytes" . | int64) 786432 -}}
{{- end -}}

{{/* Requests equal to limits: (dict "cpu" .. "memory" .. "ephemeralStorage" .. "more" MAP). */}}
{{- define "anycontrast.resources" -}}
{{- $each := dict "cpu" (toString .cpu) "memory" .memory -}}
{{- with .ephemeralStorage }}{{ $_ := set $each "ephemeral-storage" . }}{{ end -}}
{{- $each = merge $each (.more | default dict) -}}
{{- toYaml (dict "requests" $each "limits" $each) -}}
{{- end -}}

{{/* Name of a service account: (dict "root" $ "component" "head"). */}}
{{- define "anycontrast.serviceAccountName" -}}
{{- $account := get .root.Values.serviceAccounts .component -}}
{{- $account.name | default (printf "%s-%s" (include "anycontrast.fullname" .root) .component) -}}
{{- end -}}

{{/* All worker groups, each merged over the defaults, as JSON. */}}
{{- define "anycontrast.groups" -}}
{{- $groups := dict -}}
{{- range $name, $group := .Values.workerGroups -}}
{{- $_ := set $groups $name (mergeOverwrite (deepCopy $.Values.workerGroupDefaults) (deepCopy ($group | default dict))) -}}
{{- end -}}
{{- toJson $groups -}}
{{- end -}}

{{/* GPUs of all workers, the largest number with the autoscaler. */}}
{{- define "anycontrast.totalGpus" -}}
{{- $total := 0 -}}
{{- range $name, $group := include "anycontrast.groups" . | fromJson -}}
{{- $pods := ternary $group.maxReplicas $group.replicas $.Values.autoscaling.enabled | int -}}
{{- $total = add $total (mul $pods ($group.gpus.count | int)) -}}
{{- end -}}
{{- $total -}}
{{- end -}}

{{/* GPUs of the workers that are there without a job: the smallest number with the autoscaler. */}}
{{- define "anycontrast.standingGpus" -}}
{{- $total := 0 -}}
{{- range $name, $group := include "anycontrast.groups" . | fromJson -}}
{{- $pods := ternary $group.minReplicas $group.replicas $.Values.autoscaling.enabled | int -}}
{{- $total = add $total (mul $pods ($group.gpus.count | int)) -}}
{{- end -}}
{{- $total -}}
{{- end -}}

{{/* Training processes of the job. */}}
{{- define "anycontrast.numWorkers" -}}
{{- .Values.job.numWorkers | int | default (include "anycontrast.totalGpus" . | int) -}}
{{- end -}}

{{/* Packs of a step that the job's values name; empty where none does. */}}
{{- define "anycontrast.packs" -}}
{{- $packs := dig "pretrain" "stream" "packs_per_step" "" .Values.job.inlineConfig | toString -}}
{{- range .Values.job.arguments -}}
{{- if hasPrefix "pretrain.stream.packs_per_step=" . -}}
{{- $packs = trimPrefix "pretrain.stream.packs_per_step=" . -}}
{{- end -}}
{{- end -}}
{{- $packs -}}
{{- end -}}

{{/* Settings by which the recipe finds what the chart mounts; the cache is for an object store, and
a tenth of it stays free. */}}
{{- define "anycontrast.recipeSettings" -}}
{{- $cache := .Values.storage.cache -}}
cluster.num_workers={{ include "anycontrast.numWorkers" . }}
{{- if and .Values.storage.objectStore.enabled (ne $cache.kind "none") }} store.cache.folder={{ $cache.mountPath }}/shards store.cache.max_bytes={{ div (mul (include "anycontrast.mebibytes" $cache.size | int64) 1048576 9) 10 }}
{{- end -}}
{{- end -}}

{{/* Secret that holds the token; empty where KubeRay names it after a cluster not yet made. */}}
{{- define "anycontrast.tokenSecret" -}}
{{- if .Values.auth.existingSecret -}}
{{- .Values.auth.existingSecret -}}
{{- else if ne .Values.mode "job" -}}
{{- include "anycontrast.fullname" . -}}
{{- end -}}
{{- end -}}
