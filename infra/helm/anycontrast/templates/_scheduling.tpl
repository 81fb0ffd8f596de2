{{/* Gang scheduling: labels of the RayCluster or RayJob, and the scheduler of the pods. */}}

{{/* Labels of the object that is scheduled as a whole. */}}
{{- define "anycontrast.schedulingLabels" -}}
{{- $s := .Values.scheduling -}}
{{- if eq $s.gang "kueue" -}}
kueue.x-k8s.io/queue-name: {{ $s.queue | quote }}
{{- with $s.priorityClass }}
kueue.x-k8s.io/priority-class: {{ . | quote }}
{{- end }}
{{- else if eq $s.gang "volcano" -}}
volcano.sh/queue-name: {{ $s.queue | quote }}
{{- with $s.priorityClass }}
ray.io/priority-class-name: {{ . | quote }}
{{- end }}
{{- else if eq $s.gang "yunikorn" -}}
ray.io/gang-scheduling-enabled: "true"
yunikorn.apache.org/app-id: {{ include "anycontrast.fullname" . | quote }}
yunikorn.apache.org/queue: {{ $s.queue | quote }}
{{- else if eq $s.gang "kai" -}}
kai.scheduler/queue: {{ $s.queue | quote }}
{{- end -}}
{{- end -}}

{{/* Labels that the pods need themselves, as YAML. */}}
{{- define "anycontrast.schedulingPodLabels" -}}
{{- if eq .Values.scheduling.gang "kai" -}}
kai.scheduler/queue: {{ .Values.scheduling.queue | quote }}
{{- end -}}
{{- end -}}

{{/* Name of the scheduler of the pods; empty: Kubernetes' own (Kueue only holds pods back). */}}
{{- define "anycontrast.schedulerName" -}}
{{- get (dict "volcano" "volcano" "yunikorn" "yunikorn" "kai" "kai-scheduler") .Values.scheduling.gang -}}
{{- end -}}
